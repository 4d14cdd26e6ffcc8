"""setup.py and the wheels it makes."""
