"""`python -m src.evaluate`: what trained adapters draw of a fixed set of prompts, conditions and noise, and how good it is."""
