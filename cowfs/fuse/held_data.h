/* Limits the data of waiting writes: see held_data.c. */
#ifndef COWFS_HELD_DATA_H
#define COWFS_HELD_DATA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Set the limit in bytes, and that nothing is held. shared: several users share it, so that none gets all. */
void held_data_allow(uint64_t bytes, bool shared);

/* If a request is a write, and no more data may be held for its user, shorten it to one page; return its size. */
ssize_t held_data_shorten(char *request, ssize_t size);

/* Count the data of a request as held; return its bytes, 0 if it is too short to be counted. */
uint32_t held_data_take(const char *request, size_t size);

/* Count bytes of a user as no longer held, after the reply to the request. */
void held_data_give_back(uint32_t uid, uint32_t bytes);

#endif
