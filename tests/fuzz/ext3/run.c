/*
 * Runs an input, record by record.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"

#define OPENED_MAX 12 /* how often an image is opened in one run, at most */

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	bases_load();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct record records[RECORDS_MAX];
	size_t n = size / sizeof *records < RECORDS_MAX ? size / sizeof *records : RECORDS_MAX;
	struct world w;
	struct stat st;
	int opened = 0;

	if (n < 2)
		return 0;
	memcpy(records, data, n * sizeof *records); /* aligned */
	world_begin(&w, base_of(records[0].a));
	w.first = records[0];
	for (const struct record *r = records + 1; r < records + n; r++) {
		if (is_damage(r)) {
			r = damage(&w, r, records + n);
			continue;
		}
		if (!w.img && opened++ == OPENED_MAX)
			break;
		operation(&w, r);
	}
	if (w.img)
		walk(&w, 250);
	close_image(&w);
	if (fstat(w.fd, &st) || st.st_size > (off_t)(w.size > w.base->size ? w.size : w.base->size))
		finding("it was written to behind the end of the image");
	return 0;
}
