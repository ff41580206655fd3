"""The Gradio app: try a trained network in a browser, on this machine or as a Hugging Face Space."""
