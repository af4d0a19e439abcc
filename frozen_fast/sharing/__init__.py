"""Sharing a trained model: model card, upload to the Hugging Face Hub, export to ONNX and torch.export."""
