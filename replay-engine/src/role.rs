//! Which role the code that runs now has. Given to a thread, or to a stretch of
//! one in a single-threaded schedule; never derived from the kind of an event.

use heddle_proto::Role;
use std::cell::Cell;

thread_local! {
    static CURRENT: Cell<Role> = const { Cell::new(Role::Vcpu) };
}

/// The role of the code that runs now.
pub fn current() -> Role {
    CURRENT.get()
}

/// Runs `f` in `role`.
pub fn enter<T>(role: Role, f: impl FnOnce() -> T) -> T {
    struct Back(Role);
    impl Drop for Back {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _back = Back(CURRENT.replace(role));
    f()
}
