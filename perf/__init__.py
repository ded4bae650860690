"""The benchmark suite: run every workload on cowfs and on its peers, interleaved.

    run       the command: select workloads and systems, write a file in ``results/``
    report    print a results file as tables
    plot      draw a results file as bar charts
    requests  count and time the kernel's requests to a FUSE daemon (tracefs)

    bench/    one module per kind of workload: set up, run, verify
    peers/    one module per kind of system: create a store, mount, unmount
    box       the environment of one sample: directories, mounts, daemons, clients, time limit
    corpus    the data of the samples: the lower image, the archive, lists of files
    machine   the facts that the figures depend on: processor, kernel, versions, load
    samples   the figures: samples, medians, paired ratios

``docs/benchmarks.md`` describes the method and has the newest figures.
"""
