"""CLIP's image and text towers under OpenAI's parameter names, and readers of its published weights."""
