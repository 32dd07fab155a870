"""Push trained agents to the Hugging Face hub, and pull them."""
