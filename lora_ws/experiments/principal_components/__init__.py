"""A figure of principal components: accuracy over how many are kept."""
