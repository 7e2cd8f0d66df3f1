"""Multiruns that no cell can end: one fresh process per cell, a row for each, and a way to go on."""
