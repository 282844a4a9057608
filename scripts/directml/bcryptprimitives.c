/* bcryptprimitives.dll for Wine 8, which lacks it: random bytes from advapi32. */
#include <windows.h>

BOOLEAN NTAPI SystemFunction036(PVOID buffer, ULONG size); /* RtlGenRandom */

__declspec(dllexport) BOOL WINAPI ProcessPrng(BYTE *data, SIZE_T size)
{
    while (size > 0) {
        ULONG part = size > 65536 ? 65536 : (ULONG)size;
        SystemFunction036(data, part);
        data += part;
        size -= part;
    }
    return TRUE;
}
