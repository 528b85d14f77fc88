"""Export rules of ops that stay float, by Paddle op type."""
