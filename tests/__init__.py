"""The tests of cowfs; the README of the project says how to run them."""
