"""What a recipe will take: rows, bytes by role, hours, money, and what would fit."""
