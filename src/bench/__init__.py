"""`python -m src.bench`: what an adapter on a backbone costs in memory, arithmetic and time, estimated or measured."""
