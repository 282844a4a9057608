/* Stands before Wine 8's d3d12.dll so that DirectML finds what it expects of Windows:
   one device a process, no meta-commands, no 64-bit integers in shaders (which Mesa's software Vulkan
   announces and Wine's shader compiler cannot use), and no newer interfaces. */
#define COBJMACROS
#include <windows.h>

/* Places in the virtual tables; source: d3d12.h, ID3D12Device and ID3D12Device5. */
enum { CHECK_FEATURE_SUPPORT = 13, ENUMERATE_META_COMMANDS = 59 };
/* D3D12_FEATURE_D3D12_OPTIONS1: Int64ShaderOps is the sixth 32-bit field. */
enum { FEATURE_OPTIONS1 = 8, INT64_SHADER_OPS = 5, OPTIONS1_BYTES = 24 };

static const GUID IID_DEVICE = {0x189819f1, 0x1db6, 0x4b57, {0xbe, 0x54, 0x18, 0x21, 0x33, 0x9b, 0x85, 0xf7}};
static const GUID IID_DEVICE5 = {0x8b4f173b, 0x2fea, 0x4b80, {0x8f, 0x58, 0x43, 0x07, 0x19, 0x1a, 0xb9, 0x5d}};

typedef HRESULT(WINAPI *CheckFeatureSupport)(void *, int, void *, UINT);

static CRITICAL_SECTION lock;
static HMODULE wine;
static IUnknown *device;
static CheckFeatureSupport wine_check_feature_support;

BOOL WINAPI DllMain(HINSTANCE instance, DWORD reason, void *reserved)
{
    if (reason == DLL_PROCESS_ATTACH) InitializeCriticalSection(&lock);
    return TRUE;
}

static FARPROC wine_function(const char *name)
{
    if (!wine) wine = LoadLibraryW(L"C:\\windows\\system32\\d3d12.dll");
    return wine ? GetProcAddress(wine, name) : NULL;
}

static HRESULT WINAPI check_feature_support(void *self, int feature, void *data, UINT size)
{
    HRESULT result = wine_check_feature_support(self, feature, data, size);
    if (result == S_OK && feature == FEATURE_OPTIONS1 && size >= OPTIONS1_BYTES)
        ((BOOL *)data)[INT64_SHADER_OPS] = FALSE;
    return result;
}

static HRESULT WINAPI enumerate_meta_commands(void *self, UINT *count, void *descriptions)
{
    *count = 0;
    return S_OK;
}

static void *replace(void **table, int place, void *function)
{
    DWORD old;
    void *before = table[place];
    VirtualProtect(table + place, sizeof(void *), PAGE_EXECUTE_READWRITE, &old);
    table[place] = function;
    return before;
}

static HRESULT create(IUnknown *adapter, int level)
{
    HRESULT(WINAPI * function)
    (IUnknown *, int, REFIID, void **) = (void *)wine_function("D3D12CreateDevice");
    IUnknown *newer = NULL;
    HRESULT result = function ? function(adapter, level, &IID_DEVICE, (void **)&device) : E_NOTIMPL;
    if (result != S_OK) {
        device = NULL;
        return result;
    }
    wine_check_feature_support = replace(*(void ***)device, CHECK_FEATURE_SUPPORT, check_feature_support);
    if (IUnknown_QueryInterface(device, &IID_DEVICE5, (void **)&newer) == S_OK) {
        replace(*(void ***)newer, ENUMERATE_META_COMMANDS, enumerate_meta_commands);
        IUnknown_Release(newer);
    }
    return S_OK;
}

HRESULT WINAPI D3D12CreateDevice(IUnknown *adapter, int level, REFIID id, void **out)
{
    HRESULT result;
    EnterCriticalSection(&lock);
    result = device ? S_OK : create(adapter, level);
    if (result == S_OK) result = out ? IUnknown_QueryInterface(device, id, out) : S_FALSE;
    LeaveCriticalSection(&lock);
    return result;
}

HRESULT WINAPI D3D12GetInterface(REFIID class_id, REFIID id, void **out)
{
    if (out) *out = NULL;
    return E_NOINTERFACE;
}

HRESULT WINAPI D3D12EnableExperimentalFeatures(UINT count, const IID *ids, void *data, UINT *sizes)
{
    return E_NOINTERFACE;
}

HRESULT WINAPI D3D12GetDebugInterface(REFIID id, void **out)
{
    HRESULT(WINAPI * function)(REFIID, void **) = (void *)wine_function("D3D12GetDebugInterface");
    return function ? function(id, out) : E_NOTIMPL;
}

#define FORWARD(name)                                                                          \
    HRESULT WINAPI name(void *a, void *b, void *c, void *d)                                    \
    {                                                                                          \
        HRESULT(WINAPI * function)(void *, void *, void *, void *) = (void *)wine_function(#name); \
        return function ? function(a, b, c, d) : E_NOTIMPL;                                    \
    }
FORWARD(D3D12SerializeRootSignature)
FORWARD(D3D12SerializeVersionedRootSignature)
FORWARD(D3D12CreateRootSignatureDeserializer)
FORWARD(D3D12CreateVersionedRootSignatureDeserializer)
