"""The primitives of a search cell in C++, for processors."""
