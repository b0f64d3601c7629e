"""A made-up referring-expression set: program-first scenes and sentences, in the REFER layout on disk."""
