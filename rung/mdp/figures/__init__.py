"""Figures and tables of the two textbooks, computed anew.

base.py                   what a figure is
zhao.py                   Mathematical Foundations of Reinforcement Learning: what has no chance in it
zhao_sampled.py           the same book: what is learnt from samples
sutton_barto.py           Reinforcement Learning: An Introduction: what has no chance in it
sutton_barto_sampled.py   the same book: what is learnt from samples
catalogue.py              their names
page.py                   the page with computed beside published; of all these it alone reads published.toml
"""
