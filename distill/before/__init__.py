"""What is proved before money is spent: the recipe, and whether this teacher can teach this student."""
