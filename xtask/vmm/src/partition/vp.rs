//! One virtual processor and its thread.

use std::fmt::Write;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmbus::ids::VpIndex;
use vmbus_host::bus::Message;
use vmm_sys_util::signal::{self, Killable};

use super::counts::{Counter, ExitCounts, ExitKind};
use super::setup::{END_OF_MESSAGE, failed};
use super::statistics::{self, Statistics};
use super::synic::{Delivery, Synic};
use super::{End, Shared, hypercall, lock};
use crate::Error;
use crate::boot::Start;
use crate::sys::kvm::{self, HyperVExit};

/// A processor, as other threads see it.
#[derive(Debug)]
pub struct Vp {
    index: u32,
    synic: Mutex<Synic>,
    /// The message that is to be put into its slot by the VP's thread.
    outbox: Mutex<Option<Message>>,
    /// Whether the thread should look at the outbox.
    mail: AtomicBool,
    counter: Counter,
    statistics: Option<std::fs::File>,
    /// How the first processor starts, until its thread has taken it.
    start: Mutex<Option<Start>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Vp {
    /// The processor with this index, without a thread yet.
    pub fn new(index: u32, fd: &VcpuFd) -> Self {
        Self {
            index,
            synic: Mutex::default(),
            outbox: Mutex::default(),
            mail: AtomicBool::new(false),
            counter: Counter::default(),
            // Older kernels have none.
            statistics: kvm::statistics(fd).ok(),
            start: Mutex::default(),
            thread: Mutex::default(),
        }
    }

    /// Starts the thread of VP number `index`.
    pub fn start(shared: &Arc<Shared>, index: usize, fd: VcpuFd) -> Result<(), Error> {
        let theirs = Arc::clone(shared);
        let thread = thread::Builder::new()
            .name(format!("vp{index}"))
            .spawn(move || {
                Thread {
                    shared: &theirs,
                    vp: &theirs.vps[index],
                    fd,
                }
                .run();
            })
            .map_err(|error| Error::Kvm {
                what: "have a thread for a processor",
                error,
            })?;
        *lock(&shared.vps[index].thread) = Some(thread);
        Ok(())
    }

    /// Has the processor start like this.
    pub fn set_start(&self, start: Start) {
        *lock(&self.start) = Some(start);
    }

    /// The pages of its SynIC.
    pub fn synic(&self) -> MutexGuard<'_, Synic> {
        lock(&self.synic)
    }

    /// Takes a message for the thread to deliver; `false`: there is one already.
    pub fn take_message(&self, message: &Message) -> bool {
        let mut outbox = lock(&self.outbox);
        if outbox.is_some() {
            return false;
        }
        *outbox = Some(message.clone());
        drop(outbox);
        self.mail.store(true, Ordering::SeqCst);
        self.kick();
        true
    }

    /// Calls the thread out of the guest, or keeps it from going in.
    pub fn kick(&self) {
        if let Some(thread) = &*lock(&self.thread) {
            // It fails only for a signal number that does not exist.
            let _ = thread.kill(kick_signal());
        }
    }

    /// Waits for the thread's end, unless the caller is that thread.
    pub fn join(&self) {
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|it| it.thread().id() != thread::current().id()) {
            // A panic has ended the program already.
            drop(thread.join());
        }
    }

    /// Exits so far.
    pub fn counts(&self) -> ExitCounts {
        self.counter.read()
    }

    /// What KVM counts.
    pub fn statistics(&self) -> Option<Statistics> {
        statistics::read(self.statistics.as_ref()?).ok()
    }
}

/// The signal that calls a VP's thread out of the guest. It is blocked but while the guest runs, so it is never
/// lost and no handler runs.
fn kick_signal() -> i32 {
    signal::SIGRTMIN()
}

/// What the thread has.
struct Thread<'a> {
    shared: &'a Shared,
    vp: &'a Vp,
    fd: VcpuFd,
}

/// What happens after an exit.
enum Next {
    Continue,
    End(End),
}

impl Thread<'_> {
    fn run(mut self) {
        if let Err(error) = self.prepare_signals() {
            return self.end(End::Failed(format!(
                "the kick signal cannot be used: {error}"
            )));
        }
        while self.shared.gate.enter() {
            let end = self.run_guest();
            if let Some(end) = end {
                self.end(end);
            } else {
                self.shared.gate.leave();
            }
        }
    }

    /// Runs the guest until the gate closes, or the partition's end.
    fn run_guest(&mut self) -> Option<End> {
        let start = lock(&self.vp.start).take();
        if let Some(start) = start
            && let Err(error) = start.apply(&self.fd).map_err(failed("set registers"))
        {
            return Some(End::Failed(error.to_string()));
        }
        while self.shared.gate.may_stay() {
            if self.vp.mail.swap(false, Ordering::SeqCst) {
                self.deliver();
            }
            match self.step() {
                Ok(Next::Continue) => {}
                Ok(Next::End(end)) => return Some(end),
                Err(what) => return Some(End::Failed(self.describe(&what))),
            }
        }
        None
    }

    fn prepare_signals(&self) -> io::Result<()> {
        let kick = kick_signal();
        let error = |error| io::Error::other(format!("{error:?}"));
        signal::block_signal(kick).map_err(error)?;
        let blocked = signal::get_blocked_signals().map_err(error)?;
        let bits = blocked.into_iter().filter(|signal| *signal != kick);
        let mask = bits.fold(0, |mask, signal| mask | 1_u64 << (signal - 1));
        kvm::set_signal_mask(&self.fd, mask)
    }

    /// The partition has ended: nobody runs when the owner is told.
    fn end(&self, end: End) {
        let is_first = self.shared.gate.end();
        self.shared.kick_all();
        if is_first {
            self.shared.gate.wait_until_alone();
        }
        self.shared.gate.leave();
        if is_first {
            self.shared.owner.ended(end);
        }
    }

    /// Runs the guest up to its next exit and handles that.
    fn step(&mut self) -> Result<Next, String> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => {
                self.vp.counter.count(ExitKind::Interrupted);
                return match signal::clear_signal(kick_signal()) {
                    Ok(()) => Ok(Next::Continue),
                    Err(error) => Err(format!("a signal cannot be taken: {error:?}")),
                };
            }
            // A processor that waits for its start was looked at.
            Err(error) if error.errno() == libc::EAGAIN => return Ok(Next::Continue),
            Err(error) => return Err(format!("KVM cannot run the processor: {error}")),
        };
        let (shared, vp) = (self.shared, self.vp);
        let count = |kind| vp.counter.count(kind);
        match exit {
            VcpuExit::IoIn(port, data) => {
                count(ExitKind::PortRead(port));
                shared
                    .board
                    .port_read(port, data, || shared.reference_time());
            }
            VcpuExit::IoOut(port, data) => {
                count(ExitKind::PortWrite(port));
                if let Some(end) = shared.board.port_write(port, data) {
                    return Ok(Next::End(end));
                }
            }
            VcpuExit::MmioRead(address, data) => {
                count(ExitKind::MmioRead);
                shared.board.memory_read(address, data);
            }
            VcpuExit::MmioWrite(address, data) => {
                count(ExitKind::MmioWrite);
                shared.board.memory_write(address, data);
            }
            VcpuExit::X86Rdmsr(read) => {
                count(ExitKind::MsrRead(read.index));
                let value = lock(&shared.crash).read(read.index);
                *read.data = value.unwrap_or(0);
                *read.error = u8::from(value.is_none());
            }
            VcpuExit::X86Wrmsr(write) => {
                count(ExitKind::MsrWrite(write.index));
                if write.index == END_OF_MESSAGE {
                    let value = write.data;
                    *write.error = 0;
                    return self.end_of_message(value);
                }
                let taken = lock(&shared.crash).write(write.index, write.data, &shared.memory);
                *write.error = u8::from(taken.is_none());
                if let Some(crash) = taken.flatten() {
                    shared.owner.crashed(crash);
                }
            }
            VcpuExit::Hyperv => return self.hyperv(),
            VcpuExit::SystemEvent(kind, _) => {
                count(ExitKind::SystemEvent(kind));
                return match kind {
                    KVM_SYSTEM_EVENT_RESET => Ok(Next::End(End::Reset)),
                    KVM_SYSTEM_EVENT_SHUTDOWN => Ok(Next::End(End::PowerOff)),
                    KVM_SYSTEM_EVENT_CRASH => Err("KVM took a crash report itself".into()),
                    _ => Err(format!("a system event of unknown type {kind}")),
                };
            }
            VcpuExit::Shutdown => {
                count(ExitKind::Shutdown);
                return Ok(Next::End(End::TripleFault));
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => count(ExitKind::Interrupted),
            VcpuExit::InternalError => {
                let (kind, data) = kvm::internal_error(&mut self.fd);
                return Err(format!("KVM cannot emulate (error {kind}, {data:x?})"));
            }
            other => {
                count(ExitKind::Other);
                return Err(format!("an exit that nothing here handles: {other:?}"));
            }
        }
        Ok(Next::Continue)
    }

    fn hyperv(&mut self) -> Result<Next, String> {
        let (shared, counter) = (self.shared, &self.vp.counter);
        match kvm::hyperv_exit(&mut self.fd) {
            HyperVExit::Synic {
                control,
                event_page,
                message_page,
            } => {
                counter.count(ExitKind::Synic);
                let mut synic = self.vp.synic();
                synic.update(control, event_page, message_page, &shared.memory);
                drop(synic);
                // What waits may have become deliverable, or lost.
                self.deliver();
            }
            HyperVExit::Hypercall { input, parameters } => {
                let control = hypercall::Control(input);
                counter.count(ExitKind::Hypercall(control.code()));
                let status = hypercall::handle(control, parameters, &shared.memory, &*shared.owner);
                kvm::set_hypercall_result(&mut self.fd, status.0.into());
            }
            HyperVExit::Other(kind) => {
                return Err(format!("a Hyper-V exit of unknown type {kind}"));
            }
        }
        Ok(Next::Continue)
    }

    /// The guest has emptied a slot and was told that there is more.
    fn end_of_message(&mut self, value: u64) -> Result<Next, String> {
        // KVM's synthetic timers may wait for the slot, too.
        let write = kvm_msr_entry {
            index: END_OF_MESSAGE,
            data: value,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[write]).map_err(|error| format!("{error:?}"))?;
        match self.fd.set_msrs(&msrs) {
            Ok(1) => {}
            result => {
                return Err(format!(
                    "KVM does not take the end of a message: {result:?}"
                ));
            }
        }
        self.deliver();
        Ok(Next::Continue)
    }

    /// Puts the message in the outbox into its slot, if that is empty.
    fn deliver(&self) {
        let mut outbox = lock(&self.vp.outbox);
        let Some(message) = &*outbox else { return };
        let delivery = self.vp.synic().deliver(message.sint, &message.payload);
        let index = VpIndex(self.vp.index);
        match delivery {
            Delivery::SlotTaken => return,
            Delivery::Done => self.shared.interrupt(index, message.sint),
            Delivery::Lost => {}
        }
        *outbox = None;
        drop(outbox);
        self.shared.owner.message_delivered(index);
    }

    /// What happened, and the processor's state.
    fn describe(&self, what: &str) -> String {
        let mut text = format!("processor {}: {what}", self.vp.index);
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return text;
        };
        let general = [
            ("rip", regs.rip),
            ("rflags", regs.rflags),
            ("rax", regs.rax),
            ("rbx", regs.rbx),
            ("rcx", regs.rcx),
            ("rdx", regs.rdx),
            ("rsi", regs.rsi),
            ("rdi", regs.rdi),
            ("rsp", regs.rsp),
            ("rbp", regs.rbp),
            ("r8", regs.r8),
            ("r9", regs.r9),
            ("r10", regs.r10),
            ("r11", regs.r11),
            ("r12", regs.r12),
            ("r13", regs.r13),
            ("r14", regs.r14),
            ("r15", regs.r15),
            ("cr0", sregs.cr0),
            ("cr2", sregs.cr2),
            ("cr3", sregs.cr3),
            ("cr4", sregs.cr4),
            ("efer", sregs.efer),
            ("cs", sregs.cs.selector.into()),
            ("ss", sregs.ss.selector.into()),
            ("gdt", sregs.gdt.base),
            ("idt", sregs.idt.base),
            ("tr", sregs.tr.base),
        ];
        for (index, (name, value)) in general.into_iter().enumerate() {
            let before = if index % 4 == 0 { "\n " } else { "" };
            // Writing to a string does not fail.
            let _ = write!(text, "{before} {name:>6} {value:016x}");
        }
        text
    }
}
