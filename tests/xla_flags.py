"""XLA's flags for tests: compiling is most of what they do, so what only makes programs faster is left out."""

from importlib import metadata

FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if metadata.version("jaxlib").startswith("0.10."):  # later versions know only the way that takes longer
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
