/*
 * Heartbeat: every two seconds the host sends a number, and the guest sends it back plus one (spec ic.md 2 to 5).
 *
 * A whole driver in C, written against nothing but the function table: a channel in pipe mode, on which the host first
 * asks which versions the guest speaks and then begins to beat. Every answer is the request with a few fields changed.
 */
#include "vmbkmcl.h"

#define NEGOTIATE 0
#define BEAT 1

#define TRANSACTION 1
#define REQUEST 2
#define RESPONSE 4

#define IC_OK 0x00000000u
#define IC_FAILURE 0x80004005u
#define IC_NOT_SUPPORTED 0x80070032u
#define IC_INVALID_ARGUMENT 0x80070057u

/* Versions to choose from in one negotiation, as other guests limit it. */
#define MOST_VERSIONS 100

typedef struct _VERSION {
    UINT16 Major;
    UINT16 Minor;
} VERSION;

typedef struct _HEADER {
    VERSION Framework;
    UINT16 Type;
    VERSION Message;
    UINT16 BodySize;
    UINT32 Status;
    UINT8 Transaction;
    UINT8 Flags;
    UINT16 Reserved;
} HEADER;

/* Framework versions come first in Versions, then those of the messages. */
typedef struct _NEGOTIATION {
    UINT16 FrameworkCount;
    UINT16 MessageCount;
    UINT32 Reserved;
    VERSION Versions[MOST_VERSIONS];
} NEGOTIATION;

typedef struct _MESSAGE {
    HEADER Header;
    union {
        NEGOTIATION Negotiation;
        /* Low half first. */
        UINT32 Sequence[2];
    } Body;
} MESSAGE;

typedef struct _HEARTBEAT {
    KMCL_CLIENT_INTERFACE_V5 Kmcl;
    VMBCHANNEL Channel;
    BOOLEAN Ready;
    BOOLEAN Closed;
    MESSAGE Message;
} HEARTBEAT;

/* 57164f39-9115-4e78-ab55-382f3bd5422d */
static const GUID HeartbeatInterface = {
    0x57164f39, 0x9115, 0x4e78, { 0xab, 0x55, 0x38, 0x2f, 0x3b, 0xd5, 0x42, 0x2d }
};

/* For the framework and for the messages alike, the best last. */
static const VERSION Known[] = { { 1, 0 }, { 3, 0 } };

static const VERSION *PickVersion(const VERSION *Offered, UINT32 Count)
{
    for (UINT32 Best = sizeof(Known) / sizeof(Known[0]); Best-- > 0;)
        for (UINT32 Index = 0; Index < Count; Index++)
            if (Offered[Index].Major == Known[Best].Major && Offered[Index].Minor == Known[Best].Minor)
                return &Known[Best];
    return NULL;
}

static UINT32 Negotiate(HEARTBEAT *Driver, UINT32 BodyLength)
{
    NEGOTIATION *Body = &Driver->Message.Body.Negotiation;
    UINT32 Frameworks = Body->FrameworkCount, Messages = Body->MessageCount;
    const VERSION *Framework, *Message;

    /* Whatever was agreed before is no more. */
    Driver->Ready = FALSE;
    if (BodyLength < offsetof(NEGOTIATION, Versions) + (Frameworks + Messages) * sizeof(VERSION) ||
        BodyLength < offsetof(NEGOTIATION, Versions))
        return IC_INVALID_ARGUMENT;
    Framework = PickVersion(Body->Versions, Frameworks);
    Message = PickVersion(Body->Versions + Frameworks, Messages);
    if (Framework == NULL || Message == NULL) {
        Body->FrameworkCount = Body->MessageCount = 0;
        return IC_OK;
    }
    Body->FrameworkCount = Body->MessageCount = 1;
    Body->Versions[0] = *Framework;
    Body->Versions[1] = *Message;
    Driver->Message.Header.BodySize = offsetof(NEGOTIATION, Versions) + 2 * sizeof(VERSION);
    Driver->Ready = TRUE;
    return IC_OK;
}

static UINT32 Answer(HEARTBEAT *Driver, UINT32 BodyLength)
{
    UINT32 *Sequence = Driver->Message.Body.Sequence;

    if (Driver->Message.Header.BodySize > BodyLength)
        return IC_INVALID_ARGUMENT;
    switch (Driver->Message.Header.Type) {
    case NEGOTIATE:
        return Negotiate(Driver, BodyLength);
    case BEAT:
        if (!Driver->Ready)
            return IC_FAILURE;
        if (BodyLength < sizeof(Driver->Message.Body.Sequence))
            return IC_INVALID_ARGUMENT;
        if (++Sequence[0] == 0)
            ++Sequence[1];
        return IC_OK;
    default:
        return IC_NOT_SUPPORTED;
    }
}

static VOID VMBKMCL_CALL ProcessPacket(VMBCHANNEL Channel, PVOID Context, VMBPACKETCOMPLETION Packet, PVOID Buffer,
                                       UINT32 Length, UINT32 Flags)
{
    HEARTBEAT *Driver = Context;
    HEADER *Header = &Driver->Message.Header;
    UCHAR *Copy = (UCHAR *)&Driver->Message;

    (void)Flags;
    /* What is no request, or no message of this kind, has no answer. */
    if (Length >= sizeof(*Header) && Length <= sizeof(Driver->Message)) {
        for (UINT32 Index = 0; Index < Length; Index++)
            Copy[Index] = ((const UCHAR *)Buffer)[Index];
        if ((Header->Flags & (TRANSACTION | REQUEST | RESPONSE)) == (TRANSACTION | REQUEST)) {
            VMBPACKET Reply = Driver->Kmcl.VmbPacketAllocate(Channel);

            Header->Status = Answer(Driver, Length - (UINT32)sizeof(*Header));
            Header->Flags = TRANSACTION | RESPONSE;
            /* Sent, the packet frees itself. */
            if (Reply != NULL && !NT_SUCCESS(Driver->Kmcl.VmbPacketSend(Reply, Copy, Length, NULL, 0)))
                Driver->Kmcl.VmbPacketFree(Reply);
        }
    }
    Driver->Kmcl.VmbChannelPacketComplete(Packet, NULL, 0);
}

static NTSTATUS VMBKMCL_CALL Opened(VMBCHANNEL Channel, PVOID Context)
{
    (void)Channel;
    /* The host begins, with a negotiation. */
    ((HEARTBEAT *)Context)->Ready = FALSE;
    return STATUS_SUCCESS;
}

static VOID VMBKMCL_CALL Closed(VMBCHANNEL Channel, PVOID Context)
{
    (void)Channel;
    ((HEARTBEAT *)Context)->Closed = TRUE;
}

static NTSTATUS Configure(HEARTBEAT *Driver)
{
    static WCHAR Text[] = u"heartbeat";
    const UNICODE_STRING Name = { sizeof(Text) - sizeof(WCHAR), sizeof(Text), Text };
    const KMCL_CLIENT_INTERFACE_V5 *Kmcl = &Driver->Kmcl;
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5 Callbacks;
    NTSTATUS Status;

    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT_V5(&Callbacks);
    Callbacks.CallbackContext = Driver;
    Callbacks.EvtChannelOpened = Opened;
    Callbacks.EvtChannelClosed = Closed;
    if (!NT_SUCCESS(Status = Kmcl->VmbClientChannelInitSetTargetPnp(Driver->Channel, &HeartbeatInterface, NULL, NULL)) ||
        !NT_SUCCESS(Status = Kmcl->VmbChannelInitSetFriendlyName(Driver->Channel, &Name)) ||
        !NT_SUCCESS(Status = Kmcl->VmbChannelInitSetFlags(Driver->Channel, VMBUS_CHANNEL_INIT_FLAG_IS_PIPE)) ||
        !NT_SUCCESS(Status = Kmcl->VmbChannelInitSetMaximumPacketSize(Driver->Channel, sizeof(MESSAGE))) ||
        !NT_SUCCESS(Status = Kmcl->VmbChannelInitSetMaximumPacketCount(Driver->Channel, 4)) ||
        !NT_SUCCESS(Status = Kmcl->VmbClientChannelInitSetRingBufferPageCount(Driver->Channel, 3, 3)) ||
        !NT_SUCCESS(Status = Kmcl->VmbChannelInitSetStateChangeCallbacks(
                        Driver->Channel, (VMB_CHANNEL_STATE_CHANGE_CALLBACKS *)&Callbacks)) ||
        !NT_SUCCESS(Status = Kmcl->VmbChannelInitSetProcessPacketCallbacksEx(Driver->Channel, Driver, ProcessPacket, NULL)))
        return Status;
    return Kmcl->VmbChannelEnable(Driver->Channel);
}

static NTSTATUS VMBKMCL_CALL Start(PDEVICE_OBJECT Device, PVOID Extension)
{
    HEARTBEAT *Driver = Extension;
    NTSTATUS Status = VmbQueryInterface(Device, &KMCL_CLIENT_INTERFACE_TYPE, &Driver->Kmcl.Interface,
                                        sizeof(Driver->Kmcl), KMCL_CLIENT_INTERFACE_VERSION_V5);

    if (!NT_SUCCESS(Status) || !NT_SUCCESS(Status = Driver->Kmcl.VmbChannelAllocate(Device, FALSE, &Driver->Channel)))
        return Status;
    Status = Configure(Driver);
    if (!NT_SUCCESS(Status))
        Driver->Kmcl.VmbChannelCleanup(Driver->Channel);
    return Status;
}

static VOID VMBKMCL_CALL Stop(PDEVICE_OBJECT Device, PVOID Extension)
{
    HEARTBEAT *Driver = Extension;

    (void)Device;
    Driver->Kmcl.VmbChannelDisable(Driver->Channel);
    Driver->Kmcl.VmbChannelCleanup(Driver->Channel);
}

/* The device is gone; the next one needs an enabled channel. Until the old one is Disabled that is refused. */
static VOID VMBKMCL_CALL Attend(PDEVICE_OBJECT Device, PVOID Extension)
{
    HEARTBEAT *Driver = Extension;

    (void)Device;
    if (!Driver->Closed)
        return;
    Driver->Closed = FALSE;
    if (!NT_SUCCESS(Driver->Kmcl.VmbChannelEnable(Driver->Channel)))
        Driver->Closed = TRUE;
}

extern const VMB_DRIVER HeartbeatDriver;
const VMB_DRIVER HeartbeatDriver = { (const UINT8 *)"heartbeat", sizeof(HEARTBEAT), Start, Stop, Attend };
