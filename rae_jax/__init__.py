"""Representation Autoencoders (RAE) and the diffusion transformers that live in their latent space."""
