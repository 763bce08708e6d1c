"""Every reader of adapters by several questions, with what each costs."""
