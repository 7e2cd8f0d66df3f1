"""Train a control adapter: compose, check, build, fit, and prove that control was learned."""
