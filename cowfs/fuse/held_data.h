/* How much data of writes that wait is in memory: see held_data.c. */
#ifndef COWFS_HELD_DATA_H
#define COWFS_HELD_DATA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Allow so many bytes; shared: to several users, of whom none may have all. Nothing is held now. */
void held_data_allow(uint64_t bytes, bool shared);

/* If no more data may be held for the user who makes a request, and it is a write, leave of it a page; return how
 * long the request is then. */
ssize_t held_data_shorten(char *request, ssize_t size);

/* Count the data of a request as held; return how many bytes it has, 0 if it is too short to be counted. */
uint32_t held_data_take(const char *request, size_t size);

/* A user's request is answered: so many bytes less are held. */
void held_data_give_back(uint32_t uid, uint32_t bytes);

#endif
