"""Work on a store, most of it while no mount uses the store: create, grow, check, describe, copy, convert."""
