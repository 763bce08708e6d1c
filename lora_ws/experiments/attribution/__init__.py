"""Attribution in a stack of adapters: true ablation, and four shortcuts measured against it."""
