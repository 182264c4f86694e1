"""What is computed: the checkpoint's files, the description of the model, its weights by role."""
