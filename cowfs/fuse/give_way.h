/* Lets the thread of a ring step back for its callers: see give_way.c. */
#ifndef COWFS_GIVE_WAY_H
#define COWFS_GIVE_WAY_H

#include "ring_internal.h"

/* The calling thread serves *ring* from now on, until give_way_end(). It may still use all CPUs. */
void give_way_begin(struct ring *ring);
void give_way_end(struct ring *ring);

/* Send the replies of a ring. Only for its thread. */
void give_way(struct ring *ring);

/* End what watches the rings, before they are freed. */
void give_way_stop(void);

#endif
