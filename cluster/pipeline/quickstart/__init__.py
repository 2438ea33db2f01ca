"""The quickstart: every stage on a small model, with the model and the conversations that come with it."""
