"""Work on a store that no mount uses, or from beside the mount: create, grow, check, describe, keep."""
