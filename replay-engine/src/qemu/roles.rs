//! Which thread wrote or handled each event: what the tap saw, and the rule of the
//! log's grammar for logs made without it.

use heddle_proto::{Body, CheckpointKind, Event, QemuEvent, Role};

/// A thread of QEMU's, as the tap names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs TCG.
    Vcpu,
    /// Called `main`.
    Iothread,
    /// Neither.
    Other,
}

impl Thread {
    /// The thread of the tap's code for it.
    pub fn of_code(code: u8) -> Thread {
        match code {
            0 => Thread::Vcpu,
            1 => Thread::Iothread,
            _ => Thread::Other,
        }
    }

    /// Its role, if it has one.
    pub fn role(self) -> Option<Role> {
        match self {
            Thread::Vcpu => Some(Role::Vcpu),
            Thread::Iothread => Some(Role::Iothread),
            Thread::Other => None,
        }
    }
}

/// From which offset of the log on which thread was at it. Offsets ascend but for a seek.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    marks: std::collections::VecDeque<(u64, Thread)>,
}

impl Marks {
    /// From `offset` on it was `thread`. An earlier offset is a seek: all behind is forgotten.
    pub fn push(&mut self, offset: u64, thread: Thread) {
        while self.marks.back().is_some_and(|(last, _)| *last >= offset) {
            self.marks.pop_back();
        }
        self.marks.push_back((offset, thread));
    }

    /// The thread at `offset`. What is before is forgotten: ask with rising offsets.
    pub fn at(&mut self, offset: u64) -> Option<Thread> {
        while self.marks.get(1).is_some_and(|(next, _)| *next <= offset) {
            self.marks.pop_front();
        }
        self.marks.front().filter(|(from, _)| *from <= offset).map(|(_, thread)| *thread)
    }
}

/// Whether a replay must handle this event on its recorded role. Instructions are
/// book-keeping, flushed by whoever logs next; a shutdown is consumed by anyone.
pub fn is_pinned(body: &Body) -> bool {
    !matches!(
        body,
        Body::Qemu(QemuEvent::Instruction | QemuEvent::Shutdown { .. } | QemuEvent::Raw { .. })
            | Body::End
            | Body::Shutdown { .. }
            | Body::Check { .. }
            | Body::Digest { .. }
    )
}

/// The role by the log's grammar, given the event before. Clock reads can come from
/// either thread: theirs is the role of the last checkpoint.
pub fn by_rule(before: Option<&Event>, body: &Body) -> Role {
    let last = before.map_or(Role::Iothread, |event| event.role);
    match body {
        Body::Checkpoint(CheckpointKind::ClockWarpAccount | CheckpointKind::ClockVirtual) => Role::Vcpu,
        // In 7.2 a virtual timer that is set while the vCPU is halted starts the warp too.
        Body::Checkpoint(CheckpointKind::ClockWarpStart)
            if matches!(before.map(|b| &b.body), Some(Body::Checkpoint(CheckpointKind::ClockVirtual))) =>
        {
            Role::Vcpu
        }
        Body::Checkpoint(_) => Role::Iothread,
        Body::Async(_) => Role::Vcpu,
        Body::Clock { .. } => last,
        Body::Qemu(event) => match event {
            QemuEvent::Shutdown { .. } | QemuEvent::Raw { .. } | QemuEvent::Instruction => last,
            _ => Role::Vcpu,
        },
        Body::Shutdown { .. } | Body::Check { .. } | Body::Digest { .. } | Body::End => Role::Iothread,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_answer_for_rising_offsets_and_forget_at_a_seek() {
        let mut marks = Marks::default();
        marks.push(12, Thread::Iothread);
        marks.push(50, Thread::Vcpu);
        marks.push(40, Thread::Other);
        assert_eq!(marks.at(12), Some(Thread::Iothread));
        assert_eq!(marks.at(39), Some(Thread::Iothread));
        assert_eq!(marks.at(60), Some(Thread::Other));
        marks.push(70, Thread::Vcpu);
        assert_eq!((marks.at(69), marks.at(70)), (Some(Thread::Other), Some(Thread::Vcpu)));
        assert_eq!(marks.at(3), None);
    }
}
