"""The benchmark suite: every workload on cowfs and on its peers, interleaved, in one run.

    run       the command: what is measured, in which order; writes a file in ``results/``
    report    a results file as a table
    plot      a results file as bar charts
    requests  what the kernel asked a FUSE daemon, counted and timed (tracefs)

    bench/    one module per workload: set up, run, verify
    peers/    one module per system: make a store, mount, unmount
    box       where one sample happens: directories, mounts, daemon, client, time limit
    corpus    what the samples are made of: the lower image, the archive, lists of files
    machine   what the figures depend on: processor, kernel, versions, load
    samples   the figures: samples, medians, paired ratios

``docs/benchmarks.md`` has the method and the newest figures.
"""
