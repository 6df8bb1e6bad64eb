"""kvm-unit-tests, the field's own suite for a virtual x86, run from a build of it: `python -m ... PATH`."""
