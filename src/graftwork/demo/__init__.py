"""What `graft demo` trains and shows: four small tasks on real data (`tasks`)."""
