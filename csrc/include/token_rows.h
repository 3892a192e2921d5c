// The tokens of a padded batch, checked and without its padding, on the host. Plain C functions called through ctypes
// (kernels/token_rows.py): a call of one row is short, and most of what numpy's or torch's would take is their way in.
#pragma once
#include <cstdint>

#include "graph.h"

// ids, mask, types: [rows, width], contiguous; mask and types may be null. Returns twice the number of tokens, and 1 more
// where any type of a token is not 0; -1 where a row has no token, a mask is not one block of 1s between 0s, or an id or
// type lies outside 0 ... vocab - 1 or 0 ... type_vocab - 1.
EE_EXPORT int64_t consistentee_token_rows_read(const int64_t* ids, const int64_t* mask, const int64_t* types,
                                               int64_t rows, int64_t width, int64_t vocab, int64_t type_vocab);
// Of a mask that has been read: the values where it is 1, end to end, and how many each row has (lengths may be null).
// False where they are not `tokens` any more, since somebody else has written into it.
EE_EXPORT bool consistentee_token_rows_pack(const int64_t* values, const int64_t* mask, int64_t rows, int64_t width,
                                            int64_t tokens, int64_t* out, int64_t* lengths);
