/* Makes the structure one without callbacks. It registers nothing: VmbChannelInitSetStateChangeCallbacks does. */
static inline VOID VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(VMB_CHANNEL_STATE_CHANGE_CALLBACKS *Callbacks)
{
    const VMB_CHANNEL_STATE_CHANGE_CALLBACKS Empty = {
        VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION, (ULONG)sizeof(VMB_CHANNEL_STATE_CHANGE_CALLBACKS),
        NULL, NULL, NULL, NULL, NULL,
    };
    *Callbacks = Empty;
}

/* The same for the structure with a context. */
static inline VOID VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT_V5(VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5 *Callbacks)
{
    const VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5 Empty = {
        VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION_V5, (ULONG)sizeof(VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5),
        NULL, NULL, NULL, NULL, NULL, NULL,
    };
    *Callbacks = Empty;
}

/* What an MDL describes. */
#define MmGetMdlPfnArray(Mdl) ((PPFN_NUMBER)((Mdl) + 1))
#define MmGetMdlByteCount(Mdl) ((Mdl)->ByteCount)
#define MmGetMdlByteOffset(Mdl) ((Mdl)->ByteOffset)
#define MmGetMdlVirtualAddress(Mdl) ((PVOID)((UCHAR *)(Mdl)->StartVa + (Mdl)->ByteOffset))

/* Bytes of an MDL for a buffer: give as many to VmbInitializeMdl. */
#define VMB_MDL_SIZE(Buffer, Length) \
    ((UINT32)(sizeof(MDL) + ((((ULONG_PTR)(Buffer) & 0xFFF) + (Length) + 0xFFF) >> 12) * sizeof(PFN_NUMBER)))

#ifdef __cplusplus
}
#endif

#endif
