"""XLA's flags for tests."""

from importlib import metadata

# Scheduled for concurrency, eight devices on two cores may meet in different collectives, and wait for ever.
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"

# Compiling is most of what the tests do: what only makes programs faster is left out.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # 0.12 has no other way to compile fusions
