"""Statistics of a frozen detector, and what is fitted from them in closed form."""
