"""From needs to an exchange plan: proposes plans on the Pareto front with what each would do, and writes the one chosen."""
