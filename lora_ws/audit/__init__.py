"""What is known of adapter files before anyone runs them: which are the same, or nearly."""
