"""The benchmark suite: runs every workload on cowfs and on its peers, interleaved.

    run       the command: chooses workloads and systems, and writes a file in ``results/``
    report    a results file as a table
    plot      a results file as bar charts
    requests  counts and times the requests of the kernel to a FUSE daemon (tracefs)

    bench/    one module per workload: set up, run, verify
    peers/    one module per system: make a store, mount, unmount
    box       the surroundings of one sample: directories, mounts, daemon, client, time limit
    corpus    the data of the samples: the lower image, the archive, lists of files
    machine   the facts that the figures depend on: processor, kernel, versions, load
    samples   the figures: samples, medians, paired ratios

``docs/benchmarks.md`` has the method and the newest figures.
"""
