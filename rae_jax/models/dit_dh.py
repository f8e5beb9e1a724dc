"""DiT^DH: a diffusion transformer with a shallow, wide DDT head."""

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import dit
from rae_jax.models.layers import rope_2d, scan_blocks, sincos_2d, torch_linear


class DiTDH(nn.Module):
    """Velocity of noisy latents x_t [B, h, w, D] at times t [B] for labels [B].

    The trunk turns (x_t, t, label) into a condition per token; the head, wide enough for the latent,
    turns x_t and that condition into the velocity.
    """

    width: int
    depth: int
    num_heads: int
    head_width: int
    head_depth: int
    head_num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False

    @nn.compact
    def __call__(self, x, t, labels):
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels).astype(self.dtype)
        time = dit.TimeEmbedding(self.width, name="time_embed")(t)[:, None]  # [B, 1, width]
        label = dit.LabelEmbedding(self.num_classes, self.width, name="label_embed")(labels)[:, None]

        s = dit.patch_embedding(self.width, dtype=self.dtype, name="trunk_embed")(tokens)
        s = s + sincos_2d(height, width, self.width).astype(self.dtype)
        s = self._blocks(self.depth, self.num_heads, "trunk")(
            s, nn.silu(time + label), rope_2d(height, width, self.width // self.num_heads)
        )[0]
        s = nn.silu(time + s)
        if self.width != self.head_width:
            s = torch_linear(self.head_width, self.width, dtype=self.dtype, name="condition_proj")(s)

        y = dit.patch_embedding(self.head_width, dtype=self.dtype, name="head_embed")(tokens)
        y = self._blocks(self.head_depth, self.head_num_heads, "head")(
            y, s, rope_2d(height, width, self.head_width // self.head_num_heads)
        )[0]
        y = dit.FinalLayer(channels, self.dtype, name="final_layer")(y, s)
        return y.reshape(x.shape).astype(jnp.float32)

    def _blocks(self, depth, num_heads, name):
        blocks = scan_blocks(dit.Block, depth=depth, unroll=self.unroll, broadcast=2)
        return blocks(num_heads, self.mlp_ratio, self.qk_norm, self.dtype, name=name)
