"""Several searches, seeds by settings, and the page that compares them."""
