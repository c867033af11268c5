"""A page in the browser over trained models: draw, segment and look, with Gradio (https://www.gradio.app)."""
