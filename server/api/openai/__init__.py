"""Files, fine-tuning jobs, models and embeddings as OpenAI's clients ask for them: a dialect over the same stores."""
