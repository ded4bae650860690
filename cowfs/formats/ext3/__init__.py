"""Ext3 images, read and written in this process: no mount, no loop device, no privilege."""
