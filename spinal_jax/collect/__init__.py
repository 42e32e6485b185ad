"""Many runs together: one table, and one page that lists them and lays their depth traces over each other."""
