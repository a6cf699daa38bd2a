//! The client's state table (spec kmcl.md, chapter 2): what every call and event does in every state.
//!
//! The table below is the sheet's, row by row and column by column: **D** Disabled, **E** Enabled, **O** the opened and started
//! callbacks run, **A** Active, **P** Paused, **S** Suspending, **C** Closing. Every cell is a test, named after its row and
//! column; it runs at every place of its column (`rig.rs`). A cell that cannot exist says why.
//!
//! Reading a cell: `ok()` the call is done and the channel goes on as if there had been none; `says(...)` the same with
//! another answer; `.now(...)` which callbacks run at once, and the state then; `.then(...)` the same for when whatever kept the channel
//! at its place is gone (a disabled channel is enabled, the device comes, the host answers, the driver completes the packets it
//! holds); `.for_good(...)` the first, and nothing more; `.finally(...)` what the call has come to after that; `.at(...)` other
//! expectations at one place of the column.

mod calls;
mod rig;

use vmbus::kmcl::State::{Active, Disabled, Paused};

use rig::Place::{
    Connecting, DrainToClose, DrainToPause, Ended, InClosed, InOpened, InPostStarted, InStarted,
    InSuspendToClose, InSuspendToPause, TearingDown,
};
use rig::Ran::{Closed, Complete, Failure, Opened, Packet, PostStarted, Started, Suspend};
use rig::Said::{
    Answered, AtHost, Cancelled, Done, InCallback, NotNow, NotQueued, Nothing, PrimaryNotOpen,
    Queued, Rejected, Removed, Waits, WouldDeadlock,
};
use rig::{Cell, Column, Row, Setup, check, ok, only, says};

/// Makes a test of every cell that can exist, and a list of all.
macro_rules! state_table {
    ($(
        $row:ident ($act:expr $(, $field:ident)*) {
            D $d:tt
            E $e:tt
            O $o:tt
            A $a:tt
            P $p:tt
            S $s:tt
            C $c:tt
        }
    )*) => {
        $(
            mod $row {
                use super::*;

                fn row() -> Row {
                    #[allow(clippy::needless_update)]
                    let setup = Setup { $($field: true,)* ..Setup::default() };
                    Row { name: stringify!($row), setup, act: $act }
                }

                test!(disabled D $d);
                test!(enabled E $e);
                test!(opening O $o);
                test!(active A $a);
                test!(paused P $p);
                test!(suspending S $s);
                test!(closing C $c);
            }
        )*

        /// Every cell: its row, its column, and why it cannot exist if it cannot.
        fn cells() -> Vec<(&'static str, Column, Option<&'static str>)> {
            vec![$(
                (stringify!($row), Column::D, reason!($d)),
                (stringify!($row), Column::E, reason!($e)),
                (stringify!($row), Column::O, reason!($o)),
                (stringify!($row), Column::A, reason!($a)),
                (stringify!($row), Column::P, reason!($p)),
                (stringify!($row), Column::S, reason!($s)),
                (stringify!($row), Column::C, reason!($c)),
            )*]
        }
    };
}

macro_rules! test {
    ($name:ident $column:ident { cannot $reason:expr }) => {};
    ($name:ident $column:ident { $cell:expr }) => {
        #[test]
        fn $name() {
            let cell: Cell = $cell;
            check(&row(), Column::$column, &cell);
        }
    };
}

macro_rules! reason {
    ({ cannot $reason:expr }) => {
        Some($reason)
    };
    ({ $cell:expr }) => {
        None
    };
}

/// Does not compile: the setters are the builder's, and only a disabled channel gives one back.
const SETTERS: &str = "not representable: an EnabledChannel has no setters and no builder";
/// Does not compile.
const ENABLE: &str = "not representable: only a DisabledChannel has `enable`, and it takes it";
const NOT_OPENING: &str = "the host is not opening the channel";
const NO_CALLBACK: &str = "the opened callback does not run";
const NOT_PAUSED_BY_PRIMARY: &str =
    "a paused primary channel keeps its sub-channel from this state";
const NO_GPADL: &str = "no GPADL is left from before: the closed callback was its end";
const NO_RING: &str = "there is no ring";
const NO_REQUEST: &str = "no request is in flight: all ended with the channel, or none was sent";
const NO_PACKET: &str = "no delivered packet is left: the channel was drained";

state_table! {
    init_setters (calls::configure) {
        D { ok() }
        E { cannot SETTERS }
        O { cannot SETTERS }
        A { cannot SETTERS }
        P { cannot SETTERS }
        S { cannot SETTERS }
        C { cannot SETTERS }
    }
    enable (calls::enable) {
        D { ok().for_good(&[Opened, Started, PostStarted], Active) }
        E { cannot ENABLE }
        O { cannot ENABLE }
        A { cannot ENABLE }
        P { cannot ENABLE }
        S { cannot ENABLE }
        C { cannot ENABLE }
    }
    enable_sub_channel_while_its_primary_is_not_open (calls::enable_after_primary_closed, sub_channel) {
        D { says(PrimaryNotOpen).for_good(&[], Disabled) }
        E { cannot ENABLE }
        O { cannot ENABLE }
        A { cannot ENABLE }
        P { cannot ENABLE }
        S { cannot ENABLE }
        C { cannot ENABLE }
    }
    offer_matches_and_opens (calls::offer) {
        D { ok() }
        E { ok().for_good(&[Opened, Started, PostStarted], Active)
            .at(Connecting, ok()) }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    another_offer_matches (calls::another_offer) {
        D { ok() }
        E { ok().for_good(&[Opened, Started, PostStarted], Active)
            .at(Connecting, ok()) }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    open_fails_after_the_device_was_found (calls::host_refuses_to_open) {
        D { cannot NOT_OPENING }
        E { ok().then(&[Failure], Disabled) }
        O { cannot NOT_OPENING }
        A { cannot NOT_OPENING }
        P { cannot NOT_OPENING }
        S { cannot NOT_OPENING }
        C { cannot NOT_OPENING }
    }
    opened_returns_an_error (calls::refuse) {
        D { cannot NO_CALLBACK }
        E { cannot NO_CALLBACK }
        O { only(InOpened, ok().for_good(&[Failure], Disabled)) }
        A { cannot NO_CALLBACK }
        P { cannot NO_CALLBACK }
        S { cannot NO_CALLBACK }
        C { cannot NO_CALLBACK }
    }
    opened_returns_ok (calls::nothing) {
        D { cannot NO_CALLBACK }
        E { cannot NO_CALLBACK }
        O { only(InOpened, ok().for_good(&[Started, PostStarted], Active)) }
        A { cannot NO_CALLBACK }
        P { cannot NO_CALLBACK }
        S { cannot NO_CALLBACK }
        C { cannot NO_CALLBACK }
    }
    opened_returns_ok_and_the_channel_starts_paused (calls::nothing, start_paused) {
        D { cannot NO_CALLBACK }
        E { cannot NO_CALLBACK }
        O { only(InOpened, ok().for_good(&[], Paused)) }
        A { cannot NO_CALLBACK }
        P { cannot NO_CALLBACK }
        S { cannot NO_CALLBACK }
        C { cannot NO_CALLBACK }
    }
    start (calls::start, start_paused) {
        D { ok().then(&[Opened, Started, PostStarted], Active) }
        E { ok().then(&[Opened, Started, PostStarted], Active) }
        O { says(InCallback) }
        A { ok()
            .at(InPostStarted, says(InCallback)) }
        P { ok().for_good(&[Started, PostStarted], Active) }
        S { says(InCallback)
            .at(DrainToPause, ok().then(&[Started, PostStarted], Active))
            .at(DrainToClose, ok()) }
        C { says(InCallback)
            .at(TearingDown, ok()) }
    }
    pause (calls::pause) {
        D { ok().then(&[Opened], Paused) }
        E { ok().then(&[Opened], Paused) }
        O { says(InCallback) }
        A { ok().for_good(&[Suspend], Paused)
            .at(InPostStarted, says(InCallback)) }
        P { ok() }
        S { says(InCallback)
            .at(DrainToPause, says(Waits).finally(Done))
            .at(DrainToClose, says(Waits).finally(Done)) }
        C { says(InCallback)
            .at(TearingDown, says(Waits).finally(Done)) }
    }
    disable (calls::disable) {
        D { only(Ended, ok()) }
        E { ok().for_good(&[], Disabled)
            .at(Connecting, says(Waits).finally(Done).then(&[], Disabled)) }
        O { says(InCallback).for_good(&[Started, PostStarted, Suspend, Closed], Disabled)
            .at(InStarted, says(InCallback).for_good(&[PostStarted, Suspend, Closed], Disabled)) }
        A { ok().for_good(&[Suspend, Closed], Disabled)
            .at(InPostStarted, says(InCallback).for_good(&[Suspend, Closed], Disabled)) }
        P { ok().for_good(&[Closed], Disabled) }
        S { says(InCallback).then(&[Closed], Disabled)
            .at(DrainToPause, says(Waits).finally(Done).then(&[Closed], Disabled))
            .at(DrainToClose, says(Waits).finally(Done)) }
        C { says(InCallback)
            .at(TearingDown, says(Waits).finally(Done)) }
    }
    rescind (calls::rescind) {
        D { ok() }
        E { ok() }
        O { ok().for_good(&[Started, PostStarted, Suspend, Closed], Disabled)
            .at(InStarted, ok().for_good(&[PostStarted, Suspend, Closed], Disabled)) }
        A { ok().for_good(&[Suspend, Closed], Disabled) }
        P { ok().for_good(&[Closed], Disabled) }
        S { ok().then(&[Closed], Disabled) }
        C { ok() }
    }
    primary_closes (calls::primary_closes, sub_channel) {
        D { ok().then(&[], Disabled) }
        E { ok().for_good(&[], Disabled)
            .at(Connecting, ok().then(&[], Disabled)) }
        O { ok().for_good(&[Started, PostStarted, Suspend, Closed], Disabled)
            .at(InStarted, ok().for_good(&[PostStarted, Suspend, Closed], Disabled)) }
        A { ok().for_good(&[Suspend, Closed], Disabled) }
        P { ok().for_good(&[Closed], Disabled) }
        S { ok().then(&[Closed], Disabled) }
        C { ok() }
    }
    primary_pauses (calls::primary_pauses, sub_channel) {
        D { ok().then(&[Opened], Paused) }
        E { ok().then(&[Opened], Paused) }
        O { ok().for_good(&[], Paused)
            .at(InStarted, ok().for_good(&[PostStarted, Suspend], Paused)) }
        A { ok().for_good(&[Suspend], Paused) }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    primary_resumes (calls::primary_resumes, sub_channel, primary_paused) {
        D { ok().then(&[Opened, Started, PostStarted], Active) }
        E { ok().then(&[Opened, Started, PostStarted], Active) }
        O { only(InOpened, ok().for_good(&[Started, PostStarted], Active)) }
        A { cannot NOT_PAUSED_BY_PRIMARY }
        P { ok().for_good(&[Started, PostStarted], Active) }
        S { only(InSuspendToPause, ok().then(&[Started, PostStarted], Active))
            .at(DrainToPause, ok().then(&[Started, PostStarted], Active)) }
        C { ok() }
    }
    cleanup (calls::cleanup) {
        D { ok().for_good(&[], Disabled) }
        E { ok().for_good(&[], Disabled)
            .at(Connecting, ok().then(&[], Disabled)) }
        O { ok().for_good(&[Started, PostStarted, Suspend, Closed], Disabled)
            .at(InStarted, ok().for_good(&[PostStarted, Suspend, Closed], Disabled)) }
        A { ok().for_good(&[Suspend, Closed], Disabled) }
        P { ok().for_good(&[Closed], Disabled) }
        S { ok().then(&[Closed], Disabled) }
        C { ok() }
    }
    packet_allocate (calls::allocate) {
        D { ok() }
        E { ok() }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    send_without_wait (calls::send_message) {
        D { says(Rejected) }
        E { says(Queued).finally(AtHost) }
        O { says(Queued).finally(AtHost) }
        A { says(AtHost) }
        P { says(Queued) }
        S { says(Rejected) }
        C { says(Queued).finally(Removed) }
    }
    send_with_wait (calls::send_transaction) {
        D { says(Rejected) }
        E { says(Queued).finally(AtHost) }
        O { says(Queued).finally(AtHost) }
        A { says(AtHost) }
        P { says(Queued) }
        S { says(Rejected) }
        C { says(Queued).finally(Removed) }
    }
    request (calls::request) {
        D { says(Removed) }
        E { says(Waits).finally(Answered) }
        O { says(WouldDeadlock) }
        A { says(Waits).finally(Answered) }
        P { says(Waits) }
        S { says(Removed) }
        C { says(Removed) }
    }
    send_synchronous_request (calls::synchronous_request) {
        D { says(Removed) }
        E { says(Cancelled) }
        O { says(WouldDeadlock) }
        A { says(Cancelled) }
        P { says(Cancelled) }
        S { says(Removed) }
        C { says(Removed) }
    }
    send_synchronous_request_with_zero_timeout (calls::try_send) {
        D { says(Removed) }
        E { says(NotQueued) }
        O { says(NotQueued) }
        A { ok() }
        P { says(NotQueued) }
        S { says(Removed) }
        C { says(Removed) }
    }
    create_gpadl (calls::create_gpadl) {
        D { says(NotNow) }
        E { says(NotNow) }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { says(NotNow) }
    }
    delete_gpadl (calls::delete_gpadl, gpadl) {
        D { cannot NO_GPADL }
        E { cannot NO_GPADL }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { only(InClosed, ok()) }
    }
    set_interrupt_latency (calls::set_interrupt_latency, monitored) {
        D { says(NotNow) }
        E { says(NotNow) }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    get_mmio_space (calls::mmio_space) {
        D { says(Nothing) }
        E { says(Nothing) }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    set_passive_quota_and_share (calls::adjust) {
        D { ok() }
        E { ok() }
        O { ok() }
        A { ok() }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    incoming_data_packet (calls::data_packet) {
        D { cannot NO_RING }
        E { cannot NO_RING }
        O { ok().for_good(&[Started, Packet, Complete, PostStarted], Active)
            .at(InStarted, ok().for_good(&[Packet, Complete, PostStarted], Active)) }
        A { ok().for_good(&[Packet, Complete], Active) }
        P { ok() }
        S { ok() }
        C { ok() }
    }
    incoming_completion_packet (calls::completion_packet, in_flight) {
        D { cannot NO_REQUEST }
        E { cannot NO_REQUEST }
        O { only(InStarted, says(Answered)) }
        A { only(rig::Place::Active, says(Answered)) }
        P { says(Answered) }
        S { says(Answered) }
        C { says(Waits).finally(Removed) }
    }
    complete_packet (calls::complete_packet, holds) {
        D { cannot NO_PACKET }
        E { cannot NO_PACKET }
        O { cannot NO_PACKET }
        A { only(rig::Place::Active, ok()) }
        P { cannot NO_PACKET }
        S { ok().for_good(&[], Paused)
            .at(InSuspendToClose, ok().for_good(&[Closed], Disabled))
            .at(DrainToClose, ok().for_good(&[Closed], Disabled)) }
        C { cannot NO_PACKET }
    }
}

#[test]
fn no_cell_is_missing() {
    let cells = cells();
    let mut rows: Vec<_> = cells.iter().map(|(row, ..)| *row).collect();
    rows.dedup();
    assert_eq!(cells.len(), rows.len() * Column::ALL.len());
    for row in rows {
        let of_row: Vec<_> = cells.iter().filter(|(name, ..)| *name == row).collect();
        let columns: Vec<_> = of_row.iter().map(|(_, column, _)| *column).collect();
        assert_eq!(columns, Column::ALL, "{row}");
        assert!(
            of_row.iter().any(|(_, _, reason)| reason.is_none()),
            "{row} has no test"
        );
    }
}
