"""`make bench-gpu`: what a GPU computes right, and how fast, in at most 560 s on a machine without network.

__main__    flags ─▶ parent ─ one process a section ─▶ one of the sections, by name
parent      limits in time, crashes, the table; standard library alone
document    gpu.json, which a section writes anew after each result
wheels      packages that the machine lacks: fetched where there is a network, installed where there is none

ceilings · attention · correctness · torchrun · speeds · tuning · peers       the sections, a file each
setting · steps · small_runs · motifs · llama · ranks                         what sections share
"""
