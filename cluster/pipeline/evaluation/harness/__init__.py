"""Tasks of lm-evaluation-harness (Gao et al.), asked of our engines through an endpoint as OpenAI's, beside our own."""
